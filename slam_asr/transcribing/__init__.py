"""Any audio to text: long recordings are divided where nobody speaks, and what is said comes out with its times."""
