"""The network: encoder, adapter, LLM, attention masks, LoRA and the export to Hugging Face format."""
