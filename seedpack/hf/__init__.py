"""transformers' out-of-tree quantisation method `seedpack`; registered by `import seedpack`."""
