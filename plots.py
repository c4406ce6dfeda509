"""Tables and figures from the files under out/: nothing here trains or scores."""
NAMES = {"theta_o": "theta_o", ("theta_u", "npo"): "+ NPO", ("theta_u", "rmu"): "+ RMU",
         ("theta_b", "npo"): "+ NPO-Backdoor", ("theta_b", "rmu"): "+ RMU-Backdoor"}


def table(results):
    columns = [(g, c) for g in ("UE", "BE", "UT") for c in results[0]["scores"][g]]
    lines = ["| model | " + " | ".join(f"{g} {c}" for g, c in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for r in results:
        name = NAMES.get(r["role"]) or NAMES[r["role"], r["method"]]
        cells = [f"{r['scores'][g][c]:.1f}" for g, c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
