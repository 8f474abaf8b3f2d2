"""Training of both stages: `llava-bidir fit`, `validate` and `test`."""
