"""The Llama model, its checkpoint, its cache and its exits."""
