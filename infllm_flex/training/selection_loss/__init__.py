"""The selection loss: a training signal for the scores that decide which blocks are selected."""

from infllm_flex.training.selection_loss.in_stage import SelectionLoss

__all__ = ["SelectionLoss"]
