"""What the quickstart needs beside the recipe: text, a tokenizer, a report."""
