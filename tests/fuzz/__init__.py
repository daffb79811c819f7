"""Damaged, forged and odd input for every door: models, images, arrays, labels, options, scales.

A case is a kind and a seed, nothing else. ``oracle.py`` says what may become of it: success, or
exit code 2 with one line; nothing left, no minute, no 2 GB. ``test_fuzz.py`` runs a few hundred,
``make fuzz MINUTES=n`` as many as there is time for, in processes of their own.
What was found is kept in ``found/``, each case as the few lines that make it.
"""
