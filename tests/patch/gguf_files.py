"""Write a tiny Llama as a GGUF file, as ``llama.cpp`` converts it.

Source: the GGUF specification, version 3.
"""

import struct

import torch

_ALIGNMENT = 32
_STRING, _FLOAT, _UNSIGNED = 8, 6, 4  # kinds of values
_F32, _Q8_0 = 0, 8  # kinds of tensors


def write_llama(path, config, quantised):
    """Write random weights.

    Args:
        path: The file.
        config: A ``LlamaConfig``.
        quantised: Whether matrices are stored in blocks of 32 8-bit integers and their scale.
    """
    tensors = _tensors(config)
    infos, data = b"", b""
    for name, tensor in tensors.items():
        kind = _Q8_0 if quantised and tensor.dim() == 2 else _F32
        shape = struct.pack(f"<{tensor.dim()}Q", *reversed(tensor.shape))
        data += b"\0" * (-len(data) % _ALIGNMENT)
        infos += _string(name) + struct.pack("<I", tensor.dim()) + shape
        infos += struct.pack("<IQ", kind, len(data))
        data += _q8_0(tensor) if kind == _Q8_0 else tensor.numpy().tobytes()
    metadata = _metadata(config)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(name) + value for name, value in metadata.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + data)


def _tensors(config):
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {
        "attn_q": (config.num_attention_heads * head_dim, hidden),
        "attn_k": (config.num_key_value_heads * head_dim, hidden),
        "attn_v": (config.num_key_value_heads * head_dim, hidden),
        "attn_output": (hidden, config.num_attention_heads * head_dim),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    shapes = {"token_embd": (config.vocab_size, hidden), "output_norm": (hidden,)}
    shapes["output"] = (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in rows.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def _metadata(config):
    words = [f"word{index}" for index in range(config.vocab_size)]
    return {
        "general.architecture": struct.pack("<I", _STRING) + _string("llama"),
        "llama.block_count": _unsigned(config.num_hidden_layers),
        "llama.context_length": _unsigned(config.max_position_embeddings),
        "llama.embedding_length": _unsigned(config.hidden_size),
        "llama.feed_forward_length": _unsigned(config.intermediate_size),
        "llama.attention.head_count": _unsigned(config.num_attention_heads),
        "llama.attention.head_count_kv": _unsigned(config.num_key_value_heads),
        "llama.vocab_size": _unsigned(config.vocab_size),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", _FLOAT, 1e-6),
        "llama.rope.freq_base": struct.pack("<If", _FLOAT, 10_000.0),
        "tokenizer.ggml.model": struct.pack("<I", _STRING) + _string("gpt2"),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, _STRING, len(words))
        + b"".join(map(_string, words)),
    }


def _string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def _unsigned(value):
    return struct.pack("<II", _UNSIGNED, value)


def _q8_0(tensor):
    blocks = tensor.reshape(-1, 32)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (blocks / scales.float()).round().clamp(-127, 127).to(torch.int8)
    bytes_of = (part.contiguous().view(torch.uint8) for part in (scales, numbers))
    return torch.cat(list(bytes_of), dim=-1).numpy().tobytes()
