"""Random padded and packed batches, and the results of each sequence alone."""

from collections.abc import Callable, Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from infllm_flex import InfLLMConfig, infllm_attention, reference, select_blocks
from tests.inputs import make_qkv, small_config

# Four blocks of 16 per query, one of them chosen by score: longer sequences leave blocks out.
CONFIGS = [
    small_config(window_size=16, topk=3),
    small_config(window_size=16, topk=3, dense_len=100),
    small_config(window_size=0, topk=2, dense_len=60, init_blocks=0, lse="exact"),
    # An alignment of 48, and dense sequences with more blocks than sparse ones select.
    small_config(window_size=24, block_size=24, topk=3, dense_len=110),
    small_config(window_size=16, topk=3, dense_len=100, dense_by="position"),
    small_config(window_size=24, block_size=24, topk=3, dense_len=110, dense_by="position"),
]
_LENGTH = st.one_of(st.integers(1, 170), st.sampled_from([1, 16, 59, 60, 99, 100, 109, 110]))


@st.composite
def packed(draw: st.DrawFn) -> Tensor:
    """Bounds of one to six documents, some of them empty."""
    lengths = draw(st.lists(st.one_of(_LENGTH, st.just(0)), min_size=1, max_size=6))
    if sum(lengths) == 0:
        lengths.append(1)
    return torch.tensor([0, *lengths]).cumsum(0).int()


@st.composite
def padded(draw: st.DrawFn) -> Tensor:
    """A mask of one to four rows, padded on either side or entirely."""
    rows = draw(
        st.lists(st.tuples(st.integers(0, 40), _LENGTH, st.integers(0, 40)), min_size=1, max_size=3)
    )
    width = max(map(sum, rows))
    mask = torch.zeros(len(rows) + draw(st.integers(0, 1)), width, dtype=torch.int64)
    for row, (left, length, _) in zip(mask, rows, strict=False):
        row[left : left + length] = 1
    return mask


def qkv_for(batch: dict[str, Tensor], seed: int = 0, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw inputs for ``{"attention_mask": ...}`` or ``{"cu_seqlens": ...}``."""
    if "cu_seqlens" in batch:
        return make_qkv(int(batch["cu_seqlens"][-1]), seed=seed, **shape)
    B, S = batch["attention_mask"].shape
    return make_qkv(S, B=B, seed=seed, **shape)


Alone = tuple[int, slice, tuple[Tensor, ...]]


def each_alone(batch: dict[str, Tensor], query: Tensor, *keys: Tensor) -> Iterator[Alone]:
    """Yield the row, the rows of the queries and the tensors of every sequence."""
    before = keys[0].shape[2] - query.shape[2]
    for b, tokens in reference.find_sequences(keys[0].shape[2], **batch):
        rows = slice(max(tokens.start - before, 0), max(tokens.stop - before, 0))
        if rows.start < rows.stop:
            yield b, rows, (query[b, None, :, rows], *(x[b, None, :, tokens] for x in keys))


def select_alone(query: Tensor, key: Tensor, config: InfLLMConfig, **batch: Tensor) -> Tensor:
    """Select for every sequence by itself: the batch must give the same indices."""
    K = min(config.num_selected, -(-key.shape[2] // config.block_size))
    selected = torch.full((*key.shape[:2], query.shape[2], K), -1, dtype=torch.int32)
    for b, rows, alone in each_alone(batch, query, key):
        chosen = select_blocks(*alone, config)[0]
        selected[b, :, rows, : chosen.shape[-1]] = chosen
    return selected


def attend_alone(
    query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig, **batch: Tensor
) -> Tensor:
    """Attend in every sequence by itself, in the precision of the batch."""
    return _per_sequence(infllm_attention, query, key, value, config, batch)


def attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig, **batch: Tensor
) -> Tensor:
    """Attend in float64 to the blocks that every sequence selects by itself in float32."""
    return _per_sequence(_exactly, query, key, value, config, batch)


def _per_sequence(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    batch: dict[str, Tensor],
) -> Tensor:
    out = torch.zeros_like(query)
    for b, rows, alone in each_alone(batch, query, key, value):
        out[b, :, rows] = attend(*alone, config)[0]
    return out


def _exactly(query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig) -> Tensor:
    selected = select_blocks(query.float(), key.float(), config)
    mask = reference.switched_mask(selected, config, key.shape[2])
    return reference.masked_attention(query, key, value, mask, scale=query.shape[-1] ** -0.5)
