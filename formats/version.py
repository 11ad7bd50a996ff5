"""The container's version. It rises when a reader of the old one could misread the new one."""

FORMAT_VERSION = 1
