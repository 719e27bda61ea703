#!/usr/bin/env python3
"""TRL's supervised fine-tuning with sparse attention, which is one string in the YAML file.

    accelerate launch examples/trl_sft.py --config examples/trl_sft.yaml

This is `trl sft`, with infllm_flex imported first: the import makes the string known to
transformers. The settings are those of `sparse_config` in the model's config.json; a model that has
none gets those that docs/choosing-settings.md describes. Needs the package trl.
"""

import runpy

import infllm_flex  # noqa: F401

if __name__ == "__main__":
    runpy.run_module("trl.scripts.sft", run_name="__main__")
