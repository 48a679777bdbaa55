"""Triton kernels, one file a topic; ``antidote_fast.backends.triton`` launches them.

``keys.py`` says what a score is as an integer, ``search.py`` finds the m-th largest of a row in
registers. ``rows.py`` and ``long_rows.py`` prune along rows, from the kernels of ``table.py``;
``groups.py`` prunes n of each m, ``cut.py`` and its ``cut_*.py`` over whole tensors and lists.
``norms.py`` sums squares, ``fused.py`` does so inside RMSNorm and SwiGLU, ``elementwise.py`` scores
and applies masks. ``matrix.py`` is a weight with what belongs to it, ``launch.py`` starts every
kernel, ``configs.py`` holds the block sizes of what prunes by rows.

Weights come in as integers of their width, so that no element's bits ever change on the way.
"""
