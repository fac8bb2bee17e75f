"""What is computed: the decoder, its tokenizer and chat template, and how they are loaded.

`models.load` is the way in. Nothing here imports torch until a model's weights are wanted.
"""
