"""Mathematics on tensors; imports torch, numpy and scipy only."""
