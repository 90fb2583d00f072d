"""What reads bytes that others have written, and what the fuzzers give it.

:mod:`fuzz.registry` lists the decoders, each with samples that our own encoders have made. ``tests/test_fuzz.py`` gives
them mutated samples in every test run; ``make fuzz`` has :mod:`fuzz.run` look for more, guided by coverage.
"""
