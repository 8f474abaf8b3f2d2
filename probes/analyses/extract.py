"""`probes sites` and `probes states`: the sites of a model, and its states for your own analyses."""

import argparse
from pathlib import Path

from llava_bidir.common.atomic_io import check_suffix, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import read_photos
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.models.families import family_of, own_image_attention
from probes.models.load import load
from probes.models.prompt_and_pixels import check_numbers, read_config
from probes.models.sites import ENCODER, site_names


def print_sites(args: argparse.Namespace) -> None:
    """Run `probes sites`; reads the config only, so a 7B model takes no longer than a small one."""
    config = read_config(args.mllm)
    family, text_config = family_of(config), config.get_text_config()
    check_numbers(args.mllm, family, config)
    rows, columns = family.grid(config)
    print(f"{config.model_type}, {own_image_attention(config)} image attention")
    print(f"{rows} x {columns} = {rows * columns} image tokens of a {family.image_px(config)} px square")
    for site in site_names(text_config.num_hidden_layers):
        print(f"  {site:<11} {family.encoder_width(config) if site == ENCODER else text_config.hidden_size}")


def write_states(args: argparse.Namespace) -> None:
    """Run `probes states`."""
    out = Path(args.out)
    check_suffix(out, ".safetensors")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists; --overwrite true replaces it")
    images = read_photos(args.image)
    with exclusive_run_lock(out.parent, out.name):
        mllm = load(args.mllm, image_attention=args.image_attention, prefix=args.prefix)
        states = mllm.states(mllm.preprocess(images), args.sites)
        write_files({out: states})
    for site, state in states.items():
        print(f"{site:<11} {list(state.shape)}")
