"""Preset folders in KerasHub's format, read and written without building a model of KerasHub's.

Folders of KerasNLP, as KerasHub was called when the first Gemma 2 presets were made, are read as well.
"""
