"""From text to batches: sources of text, tokenizer, llama2.c shards, the order of samples, loaders."""
