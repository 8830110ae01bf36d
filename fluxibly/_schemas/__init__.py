"""Types as JSON Schemas, and JSON as values of these types.

Imports: data and its helpers. Imported by: whatever takes a schema or a type: `Validation`, `tools` and `llm`.
"""
