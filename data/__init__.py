"""The synthetic world: chain-arithmetic problems, their authors and verifier, documents, tokenizer."""
