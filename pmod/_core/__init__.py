"""The one mechanism: a collective is a linear map, declared once with its transpose."""
