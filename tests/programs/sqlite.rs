//! sqlite3: locks, journals, shared memory, fsync.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use uext_tests::scratch::Kind;
use uext_tests::{require, run};

use crate::{EXT4, Mounted, limited};

const WRITERS: u32 = 3;
const TRANSACTIONS: u32 = 12;
const ROWS: u32 = 60;

fn sqlite(database: &Path, sql: &str) -> String {
    run(limited(60, "sqlite3").arg("-bail").arg(database).arg(sql))
}

/// Several programs write one database at once; all they wrote is there, also after a remount.
fn concurrent_writers(kind: Kind, journal_mode: &str) {
    let mut mounted = Mounted::new(kind, 64);
    let database = mounted.path().join("data.sqlite");
    let mode = sqlite(&database, &format!("PRAGMA journal_mode={journal_mode};"));
    assert_eq!(mode.trim(), journal_mode);
    sqlite(&database, "CREATE TABLE t(writer INT, n INT, v BLOB); CREATE INDEX i ON t(v);");
    let mut script = String::from(".timeout 60000\n");
    for n in 0..TRANSACTIONS {
        script += &format!(
            "BEGIN IMMEDIATE; WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c \
             WHERE x<{ROWS}) INSERT INTO t SELECT abs(random())%99, {n}, randomblob(700) FROM c; \
             COMMIT;\n"
        );
    }
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let mut command = limited(90, "sqlite3");
            command.arg("-bail").arg(&database);
            let mut child = command.stdin(Stdio::piped()).spawn().expect("start sqlite3");
            let mut stdin = child.stdin.take().expect("a pipe");
            stdin.write_all(script.as_bytes()).expect("feed sqlite3");
            child
        })
        .collect();
    for mut writer in writers {
        let status = writer.wait().expect("wait");
        assert!(status.success(), "a writer failed: {status}");
    }
    let count = "PRAGMA integrity_check; SELECT count(*), count(DISTINCT v) FROM t;";
    let rows = WRITERS * TRANSACTIONS * ROWS;
    let expected = format!("ok\n{rows}|{rows}\n");
    assert_eq!(sqlite(&database, count), expected);
    mounted.check_and_remount();
    assert_eq!(sqlite(&database, count), expected);
    sqlite(&database, "DELETE FROM t WHERE n % 2; VACUUM;");
    assert!(sqlite(&database, count).starts_with("ok\n"));
    mounted.finish();
}

#[test]
fn sqlite_writers_share_a_database_with_a_rollback_journal() {
    require!("sqlite3", "mke2fs", "e2fsck");
    concurrent_writers(EXT4, "delete");
}

#[test]
fn sqlite_writers_share_a_database_with_a_write_ahead_log() {
    require!("sqlite3", "mke2fs", "e2fsck");
    concurrent_writers(EXT4, "wal");
}

#[test]
fn sqlite_writers_share_a_database_on_ext2_with_small_blocks() {
    require!("sqlite3", "mke2fs", "e2fsck");
    concurrent_writers(Kind { fs: "ext2", block_size: 1024 }, "wal");
}
