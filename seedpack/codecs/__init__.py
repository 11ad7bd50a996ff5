"""Codecs: each turns a weight into parts and back. One file a codec."""
