"""The command `llava-bidir configs`."""

import shutil
from pathlib import Path

from llava_bidir.command_options import ConfigsOptions
from llava_bidir.common.configs import FOLDER, config_names, find_config
from llava_bidir.common.errors import UserError


def run(options: ConfigsOptions) -> None:
    """Run `llava-bidir configs`: list the configs, print one, or copy one or all."""
    if options.copy:
        target = options.copy
        if options.name:
            names = [options.name]
        else:
            names = [n for n, f in config_names().items() if f.parent == FOLDER or "/" in n]
        for name in names:
            file = Path(find_config(name))
            if not file.is_relative_to(FOLDER):
                raise UserError(
                    f"{name} is a file of your own; --copy takes a config by its name, e.g. {min(config_names())}"
                )
            copy = target / file.relative_to(FOLDER)
            if copy.exists():
                raise UserError(f"{copy} exists; choose another folder (--copy)")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            print(copy)
    elif options.name:
        print(Path(find_config(options.name)).read_text(), end="")
    else:
        for name, file in config_names().items():
            if "/" in name or file.parent == FOLDER:
                print(f"{name:<22} {file.read_text().partition(chr(10))[0].removeprefix('# ')}")
