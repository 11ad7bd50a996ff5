"""Codecs: each turns a weight into parts and back. One file per codec."""
