"""What tests share: calls in every mode, servers that misbehave, recorded exchanges, strategies, and what spans say."""
