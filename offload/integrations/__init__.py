"""Adapters to other training frameworks."""
