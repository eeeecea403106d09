"""Composers: many adapters become one."""
