"""The ratios as a picture: a bar for each workload on a logarithmic scale, as SVG."""
import math
from html import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 860, 270, 70, 17, 64
COLOURS = ["#2a6f97", "#c9793b", "#5b8c5a", "#8a5a83"]


def svg(ratio, subject, peers, workloads, machine):
    """A picture of `subject` against each of `peers`: `ratio(peer, workload)`, or None."""
    values = {(w, p): ratio(p, w) for w in workloads for p in peers}
    known = [v for v in values.values() if v]
    if not known:
        return None
    low = min(-1, math.floor(math.log10(min(known))))
    high = max(1, math.ceil(math.log10(max(known))))
    height = TOP + len(workloads) * (ROW * len(peers) + 8) + 40 + 13 * len(machine)

    def x(value):
        part = (math.log10(value) - low) / (high - low)
        return LEFT + max(0, min(1, part)) * (WIDTH - LEFT - RIGHT)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
           'font-family="sans-serif" font-size="11">',
           f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
           f'<text x="12" y="20" font-size="15">{escape(subject)} against '
           f'{escape(", ".join(peers))}; to the right of 1 is faster</text>']
    for n, peer in enumerate(peers):
        out.append(f'<rect x="{12 + n * 130}" y="30" width="12" height="10" '
                   f'fill="{COLOURS[n % len(COLOURS)]}"/>'
                   f'<text x="{28 + n * 130}" y="39">/ {escape(peer)}</text>')
    bottom = TOP + len(workloads) * (ROW * len(peers) + 8)
    for decade in range(low, high + 1):
        for step in (1, 2, 5):
            value = step * 10.0 ** decade
            if math.log10(value) > high:
                continue
            at, strong = x(value), value == 1
            out.append(f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{bottom}" '
                       f'stroke="{"#333" if strong else "#ddd"}"/>')
            if step == 1 or high - low <= 2:
                out.append(f'<text x="{at:.1f}" y="{TOP - 10}" text-anchor="middle" '
                           f'fill="#555">{value:g}</text>')
    y = TOP
    for workload in workloads:
        middle = y + ROW * len(peers) / 2 + 4
        out.append(f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">'
                   f'{escape(workload)}</text>')
        for n, peer in enumerate(peers):
            value = values[workload, peer]
            if value:
                start, end = sorted((x(1), x(value)))
                out.append(f'<rect x="{start:.1f}" y="{y + 2}" width="{max(end - start, 1):.1f}" '
                           f'height="{ROW - 4}" fill="{COLOURS[n % len(COLOURS)]}"/>'
                           f'<text x="{WIDTH - RIGHT + 8}" y="{y + 12}">{value:.2f}</text>')
            else:
                out.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 12}" fill="#999">-</text>')
            y += ROW
        y += 8
    for n, line in enumerate(machine):
        out.append(f'<text x="12" y="{bottom + 24 + 13 * n}" fill="#555">{escape(line)}</text>')
    out.append("</svg>\n")
    return "\n".join(out)
