# The demo as a graph of the project's own commands. Each result appears whole or not at all, so that make knows what is
# missing after a kill; delete a result, and it is made again with all that follows from it. Two steps run at a time, on
# one thread each: the threads of two processes on two cores would only wait for each other.
#
# A rule with several targets and a % is one that makes them all at once; where % stands for a mask, $* is its name. What
# needs one of several results made at once names them all: make looks at each by itself, and would find the others fresh.
A := $(OUT)/assets
ASSETS := $(addprefix $(A)/,captions.json dialogues.json questions.json segmentation/classes.json pairs/classes.json \
  encoder/model.safetensors llm/model.safetensors)
probed = $(addprefix $(1)/,metrics.json counts.safetensors probes.safetensors)
knocked = $(addprefix $(1)/,knockout.json knockout.safetensors)
solved = $(addprefix $(1)/,metrics.json path.safetensors probes.safetensors)
asked = $(addprefix $(1)/,answers.json answers.safetensors)
patched = $(addprefix $(1)/,patching.json patching.safetensors)
mapped = $(addprefix $(1)/,maps.json maps.safetensors)
LLAVA := OMP_NUM_THREADS=1 $(PY) -m llava_bidir
PROBES := OMP_NUM_THREADS=1 $(PY) -m probes
LOOK_ALIKES := ceiling sky wall building floor road bed car
DRAWS := 0 1
# A random LLM is compared from the adapter on, a random adapter up to it.
RANDOM_LLM := --model.sites '[adapter, layer_01, layer_02, layer_03, layer_04, layer_05, layer_06]'
ASK := --limit 80 --draws 1 # of 400 questions, for the sake of time
RANDOM_ADAPTER := --model.untrained '[adapter]' --model.sites '[encoder, adapter]'
# The report joins seeds whose datasets have the same name.
SCENES := --data.root $(A)/segmentation $(if $(filter-out context,$(WORLD)),--data.name '$(WORLD) world')
EPOCHS := $(if $(filter conjunction,$(WORLD)),4,1) # of stage 2: two cues that decide together take longer to learn
STARVED := $(OUT)/bidirectional/probes/starvation.json
REPORT := $(OUT)/report/results.json

# Seed, scale and world are inputs like any other: this file changes with them, and everything follows. A finished demo of
# others is left alone.
ifneq ($(filter $(REPORT),$(MAKECMDGOALS)),)
SETTINGS := seed $(SEED) scale $(SCALE) world $(WORLD)
FOUND := $(shell cat $(OUT)/settings 2>/dev/null)
ifneq ($(FOUND),$(SETTINGS))
ifneq ($(wildcard $(REPORT)),)
$(error $(OUT) holds a finished demo of $(FOUND), not $(SETTINGS); choose another folder with OUT=, or delete it)
endif
$(shell mkdir -p $(OUT)/logs; echo "$(SETTINGS)" > $(OUT)/settings)
endif
endif

# $(call step,NAME,COMMAND): runs it with a log, and keeps the time
define step
@echo "      $(1) ..."; start=$$(date +%s); \
if $(2) > $(OUT)/logs/$(1).log 2>&1; \
then end=$$(date +%s); echo "$$start $$end $(1)" >> $(OUT)/logs/timings; printf '%4d s %s\n' $$((end - start)) $(1); \
else tail -n 20 $(OUT)/logs/$(1).log; echo "$(1) failed; all it said is in $(OUT)/logs/$(1).log"; exit 1; fi
endef

$(A)/questions%json $(A)/dialogues%json $(A)/captions%json $(A)/encoder/model%safetensors $(A)/llm/model%safetensors \
$(A)/segmentation/classes%json $(A)/pairs/classes%json: $(OUT)/settings
	$(call step,assets,$(LLAVA) demo-assets $(A) --seed $(SEED) --scale $(SCALE) --world $(WORLD))

$(OUT)/%/stage1/hf/model.safetensors: configs/demo/stage1.yaml $(ASSETS)
	$(call step,$*_stage1,$(LLAVA) fit -c $< --overwrite true --seed_everything $(SEED) --out $(OUT)/$*/stage1 \
	  --model.image_attention $* --model.encoder.path $(A)/encoder --model.llm $(A)/llm \
	  --data.annotations $(A)/captions.json --data.images $(A))

$(OUT)/%/stage2/hf/model.safetensors: configs/demo/stage2.yaml $(OUT)/%/stage1/hf/model.safetensors
	$(call step,$*_stage2,$(LLAVA) fit -c $< --trainer.max_epochs $(EPOCHS) --overwrite true --seed_everything $(SEED) \
	  --out $(OUT)/$*/stage2 \
	  --model.image_attention $* --model.encoder.path $(A)/encoder --model.llm $(A)/llm \
	  --model.adapter $(OUT)/$*/stage1/hf --data.annotations $(A)/dialogues.json \
	  --data.val_annotations $(A)/questions.json --data.images $(A))

$(call probed,$(OUT)/%/probes): configs/demo/probes.yaml $(OUT)/%/stage2/hf/model.safetensors
	$(call step,$*_probes,$(PROBES) fit -c $< --overwrite true --seed_everything $(SEED) --out $(OUT)/$*/probes \
	  --model.mllm $(OUT)/$*/stage2/hf $(SCENES))

$(call probed,$(OUT)/%/untrained): configs/demo/probes.yaml configs/demo/untrained.yaml \
  $(OUT)/%/stage2/hf/model.safetensors
	$(call step,$*_untrained,$(PROBES) fit --overwrite true -c $< -c configs/demo/untrained.yaml --seed_everything $(SEED) \
	  --out $(OUT)/$*/untrained --model.mllm $(OUT)/$*/stage2/hf $(SCENES))

$(call solved,$(OUT)/%/solved): configs/demo/probes.yaml $(OUT)/%/stage2/hf/model.safetensors
	$(call step,$*_solved,$(PROBES) solve -c $< --overwrite true --seed_everything $(SEED) \
	  --out $(OUT)/$*/solved --model.mllm $(OUT)/$*/stage2/hf $(SCENES))

# $(call random_draw,DRAW): a random LLM that changes the states as much as the trained one, and a random adapter
define random_draw
$$(call solved,$$(OUT)/%/random$(1)): configs/demo/probes.yaml configs/probes/matched.yaml \
  $$(OUT)/%/stage2/hf/model.safetensors
	$$(call step,$$*_random$(1),$$(PROBES) solve -c $$< -c configs/probes/matched.yaml --model.draw $(1) $$(RANDOM_LLM) \
	  --overwrite true --seed_everything $$(SEED) --out $$(OUT)/$$*/random$(1) --model.mllm $$(OUT)/$$*/stage2/hf \
	  $$(SCENES))

$$(call solved,$$(OUT)/%/adapter$(1)): configs/demo/probes.yaml $$(OUT)/%/stage2/hf/model.safetensors
	$$(call step,$$*_adapter$(1),$$(PROBES) solve -c $$< $$(RANDOM_ADAPTER) --model.draw $(1) \
	  --overwrite true --seed_everything $$(SEED) --out $$(OUT)/$$*/adapter$(1) \
	  --model.mllm $$(OUT)/$$*/stage2/hf $$(SCENES))

$$(call knocked,$$(OUT)/%/random$(1)): $$(call solved,$$(OUT)/%/random$(1))
	$$(call step,$$*_random$(1)_knockout,$$(PROBES) knockout --overwrite true --probes $$(OUT)/$$*/random$(1) --classes $$(LOOK_ALIKES) \
	  --draws 1)
endef
$(foreach draw,$(DRAWS),$(eval $(call random_draw,$(draw))))

# $(call task,TASK): its probes in closed form, of the trained model and of a random LLM that changes the states as much
define task
$$(call solved,$$(OUT)/%/$(1)): configs/demo/probes.yaml $$(OUT)/%/stage2/hf/model.safetensors
	$$(call step,$$*_$(1),$$(PROBES) solve -c $$< --data.task $(1) --overwrite true \
	  --seed_everything $$(SEED) --out $$(OUT)/$$*/$(1) --model.mllm $$(OUT)/$$*/stage2/hf $$(SCENES))

$$(call solved,$$(OUT)/%/$(1)_random): configs/demo/probes.yaml configs/probes/matched.yaml \
  $$(OUT)/%/stage2/hf/model.safetensors
	$$(call step,$$*_$(1)_random,$$(PROBES) solve -c $$< -c configs/probes/matched.yaml --data.task $(1) $$(RANDOM_LLM) \
	  --overwrite true --seed_everything $$(SEED) --out $$(OUT)/$$*/$(1)_random \
	  --model.mllm $$(OUT)/$$*/stage2/hf $$(SCENES))
endef
TASKS := depth normals boundaries
$(foreach name,$(TASKS),$(eval $(call task,$(name))))

$(call knocked,$(OUT)/%/probes): $(call probed,$(OUT)/%/probes)
	$(call step,$*_knockout,$(PROBES) knockout --overwrite true --probes $(OUT)/$*/probes --classes $(LOOK_ALIKES) \
	  --draws 1)

$(call knocked,$(OUT)/%/solved): $(call solved,$(OUT)/%/solved)
	$(call step,$*_solved_knockout,$(PROBES) knockout --overwrite true --probes $(OUT)/$*/solved --classes $(LOOK_ALIKES) --draws 1)

$(call asked,$(OUT)/%/solved): $(call solved,$(OUT)/%/solved) $(A)/questions.json
	$(call step,$*_answers,$(PROBES) answers --overwrite true --probes $(OUT)/$*/solved $(ASK))

$(call asked,$(OUT)/%/random0): $(call solved,$(OUT)/%/random0) $(A)/questions.json
	$(call step,$*_random0_answers,$(PROBES) answers --overwrite true --probes $(OUT)/$*/random0 $(ASK))

$(call patched,$(OUT)/%/solved): $(call solved,$(OUT)/%/solved) $(A)/pairs/classes.json
	$(call step,$*_patching,$(PROBES) patching --overwrite true --probes $(OUT)/$*/solved --pairs $(A)/pairs --limit 100 --draws 1)

$(call mapped,$(OUT)/%/probes): $(call knocked,$(OUT)/%/probes)
	$(call step,$*_maps,$(PROBES) maps --overwrite true --probes $(OUT)/$*/probes --image 0 1 2 3 --classes ceiling road)

$(OUT)/%/probes/umap.json: $(call probed,$(OUT)/%/probes)
	$(call step,$*_umap,$(PROBES) umap --overwrite true --probes $(OUT)/$*/probes --image 0)

$(STARVED): $(call probed,$(OUT)/causal/probes) $(call probed,$(OUT)/bidirectional/probes)
	$(call step,starvation,$(PROBES) starvation --overwrite true --probes $(OUT)/causal/probes $(OUT)/bidirectional/probes \
	  --by-class --flip horizontal rotate)

$(OUT)/report/explorer.html: $(call probed,$(OUT)/causal/probes) $(call probed,$(OUT)/bidirectional/probes)
	$(call step,explorer,$(PROBES) explore $(OUT)/causal/probes $(OUT)/bidirectional/probes \
	  --images 0 1 2 3 4 5 6 7 8 9 10 11 --out $(OUT)/report)

# All results are named here, since make takes what only patterns name for scrap that need not exist.
MASKS := causal bidirectional
SOLVED := solved $(addprefix random,$(DRAWS))
ADAPTERS := $(addprefix adapter,$(DRAWS))
# Extras are results that no claim needs; they take half of the time of a small demo.
ifneq ($(EXTRAS),)
TASK_RUNS := $(TASKS) $(addsuffix _random,$(TASKS))
EXTRA_RESULTS := $(foreach mask,$(MASKS),$(OUT)/$(mask)/probes/umap.json $(call mapped,$(OUT)/$(mask)/probes) \
  $(call patched,$(OUT)/$(mask)/solved))
endif
# $(call demo_runs,FOLDERS): all probe runs of some demos; other_tasks: the report's option with those of other tasks
demo_runs = $(foreach demo,$(1),$(foreach mask,$(MASKS),$(addprefix $(demo)/$(mask)/,probes untrained $(SOLVED) $(ADAPTERS))))
other_tasks = $(if $(TASK_RUNS),--tasks $(foreach demo,$(1),$(foreach mask,$(MASKS),$(addprefix $(demo)/$(mask)/,$(TASK_RUNS)))))
$(REPORT): $(foreach mask,$(MASKS),$(OUT)/$(mask)/stage1/hf/model.safetensors \
    $(OUT)/$(mask)/stage2/hf/model.safetensors \
    $(call knocked,$(OUT)/$(mask)/probes) $(call probed,$(OUT)/$(mask)/probes) $(call probed,$(OUT)/$(mask)/untrained) \
    $(foreach run,$(SOLVED),$(call solved,$(OUT)/$(mask)/$(run)) $(call knocked,$(OUT)/$(mask)/$(run))) \
    $(foreach run,solved random0,$(call asked,$(OUT)/$(mask)/$(run))) \
    $(foreach run,$(ADAPTERS) $(TASK_RUNS),$(call solved,$(OUT)/$(mask)/$(run)))) \
    $(STARVED) $(EXTRA_RESULTS) $(ASSETS) $(OUT)/report/explorer.html
	$(call step,report,$(PROBES) report $(call demo_runs,$(OUT)) $(call other_tasks,$(OUT)) \
	  --out $(OUT)/report --timings $(OUT)/logs/timings)
