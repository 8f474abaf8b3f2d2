"""`probes sites`, `mask` and `states`: the sites of a model, its mask, and its states for your own analyses."""

from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import check_new, exclusive_run_lock, write_files
from llava_bidir.common.images import read_photos
from probes.config import MaskOptions, SitesOptions, StatesOptions
from probes.models.families import EncoderFamily, Family, family_of, own_image_attention
from probes.models.families.encoder_layers import encoder_layers
from probes.models.families.layer_parts import part_sites, parts_text, why_no_part
from probes.models.families.modules import MODULE_TYPE, why_no_parts
from probes.models.read_config import check_numbers, read_config
from probes.models.sites import last_layer, layer_number, part_names, part_of


def print_sites(options: SitesOptions) -> None:
    """Run `probes sites`; reads the config only, so a 7B model takes no longer than a small one."""
    config = read_config(options.mllm, trust=options.trust)
    family = family_of(config)
    if options.image_px is not None:
        family = family.with_side(options.image_px, config)
    check_numbers(options.mllm, family, config)
    rows, columns = family.grid(config)
    tokens = "image tokens" if family.has_llm else "patches"
    print(f"{config.model_type}, {own_image_attention(config)} image attention")
    print(f"{rows} x {columns} = {rows * columns} {tokens} of a {family.side_px(config)} px square")
    for site, width in family.widths(config).items():
        print(f"  {site:<11} {width}")
    if family.has_llm:
        print(describe_encoder_layers(family, config))
    print(describe_parts(family, config))
    if config.model_type == MODULE_TYPE:
        names = config.layer_names
        print(f"layers: {names[0]} to {names[-1]}; what runs before or after them is not read")


def describe_encoder_layers(family: Family, config: PreTrainedConfig) -> str:
    """Return the sites in the encoder of an MLLM, which are read by name only, or why there are none."""
    try:
        layers = encoder_layers(family, config)
    except UserError as error:
        return f"no sites in the encoder: {error}"
    return f"by name, or with `all`: {layers.sites[0]} to {layers.sites[-1]}, width {layers.width}"


def describe_parts(family: Family | EncoderFamily, config: PreTrainedConfig) -> str:
    """Return the sites inside the layers, which are read by name only, and layers that lack one of them."""
    last = layer_number(last_layer(family.sites(config)))
    readable = part_sites(family, config)
    if not readable:
        why = why_no_parts(config) or why_no_part(family, config, part_names(1)[-1])
        return f"no sites inside the layers: {why}"
    kinds = {part_of(site) for site in readable}
    parts = [site for layer in range(1, last + 1) for site in part_names(layer)]
    without = [site for site in parts if part_of(site) in kinds and site not in readable]
    text = f"by name, or with `all_parts`: {parts_text(kinds)}, 01 to {last:02d}"
    return f"{text}, without {', '.join(without)}" if without else text


def print_mask(options: MaskOptions) -> None:
    """Run `probes mask`.

    Raises:
        UserError: The model has no LLM, or attends otherwise than its config and family say.
    """
    from probes.models.load import load

    if options.png:
        check_new(options.png, ".png", options.overwrite)
    if not family_of(read_config(options.mllm, trust=options.trust)).has_llm:
        raise UserError(
            f"{options.mllm} is a bare vision encoder: all its patches attend to each other"
        )
    mllm = load(options.mllm, options.image_attention, dtype="float32")
    measured = mllm.measured_mask()
    forward = "its own forward"
    if mllm.image_attention != mllm.own_image_attention:
        forward = f"as `probes` runs it; its own mask is {mllm.own_image_attention}"
    print(f"{mllm.model.config.model_type}, {mllm.image_attention} image attention, {forward}")
    print(measured)
    if options.png:
        from .attention_pictures import draw_mask

        draw_mask(measured, options.png)
    if disagreements := measured.disagreements():
        said = f"{options.mllm} does not attend as {mllm.image_attention} says"
        raise UserError(f"{said}: {'; '.join(disagreements)}")


def write_states(options: StatesOptions) -> None:
    """Run `probes states`."""
    from probes.models.load import load

    out = options.out
    check_new(out, ".safetensors", options.overwrite)
    images = read_photos(options.image)
    with exclusive_run_lock(out.parent, out.name):
        mllm = load(
            options.mllm,
            image_px=options.image_px,
            image_attention=options.image_attention,
            prefix=options.prefix,
            trust=options.trust,
        )
        sites = options.sites and list(options.sites)
        states = mllm.states(mllm.preprocess(images), sites)
        # two sites can be one tensor: the layer that the adapter reads, and its input
        states = {site: state.clone() for site, state in states.items()}
        write_files({out: states})
    for site, state in states.items():
        print(f"{site:<11} {list(state.shape)}")
