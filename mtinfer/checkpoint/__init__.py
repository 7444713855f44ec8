"""From a file to named weights: reading, key tables, converted files, and metadata without torch.

Import from the modules (`load`, `archive`, `peek`): this package itself imports nothing, so that reading
the metadata of a file never costs an import of torch.
"""
