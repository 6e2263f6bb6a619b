"""GGUF files of Gemma 2, which llama.cpp and Ollama run: written from any checkpoint, and read back exactly."""
