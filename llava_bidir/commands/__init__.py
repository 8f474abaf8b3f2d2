"""Commands of `llava-bidir` other than training and evaluation, one file each."""
