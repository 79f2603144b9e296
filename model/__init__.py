"""Model: the mathematics of DeepSeek-V3. Nothing here knows requests.

config.py, weights.py         a checkpoint's configuration and its tensors; checkpoint.py first compares the two
batch.py, pages.py            one step's tokens and pages; kv_cache.py has the pages' pool
transformer.py                the whole model; mla.py, moe.py, ffn.py, head.py and layers.py are its parts
logits_processors.py          what a request changes in logits: penalties, bias, banned tokens
sampling.py                   logits to tokens; a token depends on its request alone
footprint.py                  the bytes of weights and of a step's tensors, by shape; divisibility.py: what must divide

May import kernels/ and parallel/.
"""
