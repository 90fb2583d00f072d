"""This version of Understudy."""

from __future__ import annotations

import importlib.metadata

VERSION = importlib.metadata.version("understudy")  # looked up once: it reads files
