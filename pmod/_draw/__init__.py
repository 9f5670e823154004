"""Pictures of tensors and collectives."""
