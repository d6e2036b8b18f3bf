//! [`is_plain`]: whether a statement leaves the state of the transaction alone, by its first word.

/// Statements that can neither begin nor end a transaction, nor begin a COPY. (A function that they call cannot either:
/// only what `CALL` and `DO` run can.)
const PLAIN: [&str; 6] = ["SELECT", "INSERT", "UPDATE", "DELETE", "VALUES", "WITH"];

/// Whether this is a statement of [`PLAIN`]. `false` says nothing. The text must be that of one prepared statement: it
/// holds no second one then, or the server refuses it.
pub(super) fn is_plain(sql: &str) -> bool {
    let sql = skip(sql);
    let word = sql.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(sql.len());
    let (word, rest) = sql.split_at(word);
    let is_whole = !rest.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '_' | '$') || !c.is_ascii());
    is_whole && PLAIN.iter().any(|plain| plain.eq_ignore_ascii_case(word))
}

/// The text from its first word on, without what PostgreSQL skips: white space, and comments, which may be nested.
fn skip(mut sql: &str) -> &str {
    loop {
        sql = sql.trim_start_matches([' ', '\t', '\n', '\r', '\x0c']);
        if let Some(comment) = sql.strip_prefix("--") {
            sql = comment.find(['\n', '\r']).map_or("", |end| &comment[end..]);
        } else if sql.starts_with("/*") {
            sql = after_comment(sql);
        } else {
            return sql;
        }
    }
}

/// What follows a comment that begins with `/*`. Nothing follows one that does not end.
fn after_comment(sql: &str) -> &str {
    let (mut depth, mut rest) = (0, sql);
    loop {
        let Some(mark) = rest.find(['*', '/']) else { return "" };
        rest = &rest[mark..];
        let (step, length) = match rest.as_bytes() {
            [b'/', b'*', ..] => (1, 2),
            [b'*', b'/', ..] => (-1, 2),
            _ => (0, 1),
        };
        depth += step;
        rest = &rest[length..];
        if depth == 0 {
            return rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_the_first_word() {
        for sql in [
            "SELECT 1",
            "select",
            "SELECT(1)",
            "SELECT/**/1",
            "SELECT'BEGIN'",
            "SELECT\"BEGIN\"",
            " \t\r\n\x0cSelect 1",
            "INSERT INTO t VALUES (1)",
            "update t SET n = 1",
            "DELETE FROM t",
            "VALUES (1)",
            "WITH t AS (SELECT 1) DELETE FROM u",
            "-- BEGIN\nSELECT 1",
            "--\rSELECT 1",
            "/* BEGIN */SELECT 1",
            "/* /* */ BEGIN */ SELECT 1",
            "/**/ -- \n /***/ SELECT 1",
            "/*/ BEGIN */ SELECT 1",
        ] {
            assert!(is_plain(sql), "{sql}");
        }
        for sql in [
            "",
            ";",
            "BEGIN",
            "COMMIT",
            "CALL p()",
            "DO $$ BEGIN COMMIT; END $$",
            "COPY t FROM STDIN",
            "EXECUTE p",
            "EXPLAIN ANALYZE SELECT 1",
            "TABLE t",
            "(SELECT 1)",
            ";SELECT 1",
            "SELECTS",
            "SELECT_1",
            "SELECT1",
            "SELECT$1",
            "SELECTÄ",
            "-- SELECT 1",
            "--\rBEGIN --\nSELECT 1",
            "/* SELECT 1",
            "/* /* */ SELECT 1",
            "/* /* */ SELECT 1 */ BEGIN",
            "/*/ SELECT 1 */ BEGIN",
            "/*/*/ SELECT 1 */ BEGIN",
            "/* SELECT */ BEGIN",
            "- SELECT 1",
            "\u{a0}SELECT 1",
        ] {
            assert!(!is_plain(sql), "{sql}");
        }
    }
}
