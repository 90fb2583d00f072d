"""Backups at rest: made from a directory whose server goes on, kept, verified, restored."""
