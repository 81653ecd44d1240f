"""What tests share: tiny models, golden data, processes, records."""
