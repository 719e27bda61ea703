"""The engines that attend to selected blocks: the fused operator and FlexAttention."""
