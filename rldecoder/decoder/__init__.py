"""The feature decoder: SAE latents to next-token logits, as a transformers model."""
