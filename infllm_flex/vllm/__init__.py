"""InfLLM-V2 in vLLM: a plugin that vLLM loads by its entry point ``vllm.general_plugins``.

Only the modules ``plugin``, ``backend`` and ``attention`` import vLLM, and nothing outside this
folder imports them.
"""
