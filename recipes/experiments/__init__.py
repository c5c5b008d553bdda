"""Experiments behind the tables of this repository. They use the library; it never imports them."""
