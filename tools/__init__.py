"""Tools that build what the package ships: its corpus, its tokenizer and its model."""
