"""InfLLM-V2 in vLLM: a plugin that vLLM loads by its entry point ``vllm.general_plugins``.

Only the modules ``plugin``, ``backend``, ``attention`` and ``vllm_config`` import vLLM, and nothing
outside this folder imports them.
"""
