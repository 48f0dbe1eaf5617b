//! The table and the JSON of `uext bench-dev`.

use std::path::Path;

use serde_json::{Value, json};

use super::load::Figures;
use super::{BenchDevArgs, Cell};

/// Prints the table, or writes the figures.
pub(super) fn write(args: &BenchDevArgs, cells: &[Cell]) -> Result<(), String> {
    let text = format!("{:#}\n", as_json(args, cells));
    match &args.json {
        Some(path) if path == Path::new("-") => {
            print!("{text}");
            return Ok(());
        }
        Some(path) => {
            std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?
        }
        None => {}
    }
    println!(
        "{:9} {:>7} {:>5} {:6} {:4} {:>9} {:>8} {:>9} {:>9} {:>6}",
        "rw", "bytes", "depth", "engine", "plug", "IOPS", "MB/s", "mean us", "p99 us", "x"
    );
    for cell in cells {
        println!(
            "{:9} {:>7} {:>5} {:6} {:4} {:>9.0} {:>8.1} {:>9.1} {:>9.1} {:>6}",
            format!("{:?}", cell.operation).to_lowercase(),
            cell.block_size,
            cell.depth,
            format!("{:?}", cell.engine).to_lowercase(),
            if cell.plug { "on" } else { "off" },
            cell.median(|figures| figures.iops),
            cell.median(|figures| figures.bytes_per_second) / 1e6,
            cell.median(|figures| figures.mean_us),
            cell.median(|figures| figures.p99_us),
            unplugged(cell, cells).map_or(String::new(), |ratio| format!("{ratio:.2}")),
        );
    }
    println!("x: plugged against unplugged; medians of {} rounds", args.rounds);
    Ok(())
}

impl Cell {
    fn median(&self, of: impl Fn(&Figures) -> f64) -> f64 {
        median(self.rounds.iter().map(of).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// How a plugged cell compares with the same without: the median of the rounds' ratios,
/// which the machine's drift between rounds doesn't touch.
fn unplugged(cell: &Cell, cells: &[Cell]) -> Option<f64> {
    let other = cells.iter().find(|other| {
        cell.plug
            && !other.plug
            && other.engine == cell.engine
            && other.operation == cell.operation
            && other.block_size == cell.block_size
            && other.depth == cell.depth
    })?;
    let pairs = cell.rounds.iter().zip(&other.rounds);
    Some(median(pairs.map(|(with, without)| with.iops / without.iops).collect()))
}

fn as_json(args: &BenchDevArgs, cells: &[Cell]) -> Value {
    let cells: Vec<Value> = cells
        .iter()
        .map(|cell| {
            json!({
                "rw": format!("{:?}", cell.operation).to_lowercase(),
                "block_size": cell.block_size,
                "depth": cell.depth,
                "engine": format!("{:?}", cell.engine).to_lowercase(),
                "plug": cell.plug,
                "iops": cell.median(|figures| figures.iops),
                "bytes_per_second": cell.median(|figures| figures.bytes_per_second),
                "mean_us": cell.median(|figures| figures.mean_us),
                "p99_us": cell.median(|figures| figures.p99_us),
                "iops_of_rounds":
                    cell.rounds.iter().map(|figures| figures.iops).collect::<Vec<f64>>(),
                "plugged_against_unplugged": unplugged(cell, cells),
            })
        })
        .collect();
    json!({
        "path": args.path.display().to_string(),
        "seconds": args.seconds,
        "rounds": args.rounds,
        "cells": cells,
    })
}
