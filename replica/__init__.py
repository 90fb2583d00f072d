"""Runs where the copy lives: follows a primary, applies its log, and can be promoted."""
