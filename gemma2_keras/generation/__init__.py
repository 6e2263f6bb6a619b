"""Token ids to more token ids: prefill, decoding steps and sampling loops. Knows no tokenizer."""
