"""Fine-tuning: data of any kind as tokens, packed, and long runs that survive an interruption."""
