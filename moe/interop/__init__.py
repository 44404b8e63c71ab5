"""Models in the formats of others."""

from .safetensors import ExportReceipt, export_safetensors, is_export, read_export

__all__ = ["ExportReceipt", "export_safetensors", "is_export", "read_export"]
