"""Hugging Face folders: weights, tokenizer and chat format of Qwen3, Qwen2, Qwen2.5, Llama and SmolLM2."""
