//! The `application_name` under which the server knows a pool's connections, and which such names are of the same
//! application.

/// PostgreSQL shortens a longer `application_name`.
const MAX_APPLICATION_NAME: usize = 63;

/// The pool's name and the process id. The name is shortened if both would be too long for PostgreSQL. Characters that
/// are not printable ASCII are replaced here: the server would replace them by `?` or, since PostgreSQL 16, by
/// something longer, which might push out the process id.
pub(super) fn application_name(pool: &str, pid: u32) -> String {
    let suffix = format!(" [{pid}]");
    let printable = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
    let name: String = pool.chars().map(printable).take(MAX_APPLICATION_NAME - suffix.len()).collect();
    name + &suffix
}

/// The process id at the end of an `application_name`, and what stands before it.
pub(super) fn process(name: &str) -> Option<(&str, u32)> {
    let (prefix, digits) = name.strip_suffix(']')?.rsplit_once(" [")?;
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    Some((prefix, digits.parse().ok().filter(|_| plain)?))
}

/// Which `application_name`s are this application's.
pub(super) enum Names {
    /// This one, with any process id.
    Any(String),
    /// One of these, which different servers make of the same name.
    These(Vec<String>),
}

impl Names {
    /// `own` is the `application_name` of this process, `pool` the name of the pool.
    pub(super) fn new(own: &str, pool: &str) -> Names {
        let me = std::process::id();
        match process(own) {
            _ if own == application_name(pool, me) => Names::Any(pool.into()),
            Some((prefix, pid)) if pid == me => Names::Any(prefix.into()),
            _ => Names::These(as_servers_say(own)),
        }
    }

    /// Whether `name` is one of these. How much is left of a name that is too long depends on the process id, which is
    /// taken from `name`.
    pub(super) fn matches(&self, name: &str) -> bool {
        match self {
            Names::Any(full) => process(name).is_some_and(|(_, pid)| application_name(full, pid) == name),
            Names::These(names) => names.iter().any(|n| n == name),
        }
    }
}

/// What servers make of a name: bytes that are not printable ASCII become `?` until PostgreSQL 15, `\xc3` since; then
/// it is shortened.
fn as_servers_say(name: &str) -> Vec<String> {
    let shortened = |mut name: String| {
        name.truncate(MAX_APPLICATION_NAME);
        name
    };
    let printable = |b: u8| (b == b' ' || b.is_ascii_graphic()).then(|| char::from(b).to_string());
    vec![
        shortened(name.bytes().map(|b| printable(b).unwrap_or("?".into())).collect()),
        shortened(name.bytes().map(|b| printable(b).unwrap_or_else(|| format!("\\x{b:02x}"))).collect()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit() {
        assert_eq!(application_name("orders", 42), "orders [42]");
        let long = application_name(&"ä".repeat(100), 4_294_967_295);
        assert!(long.len() <= MAX_APPLICATION_NAME && long.ends_with("? [4294967295]"), "{long}");
        assert_eq!(application_name("a\0b\nc d", 1), "a?b?c d [1]");
    }

    #[test]
    fn a_process_in_a_name() {
        assert_eq!(process("orders [42]"), Some(("orders", 42)));
        assert_eq!(process("a [1] [42]"), Some(("a [1]", 42)));
        for name in ["orders", "orders [x]", "orders[42]", "orders [42] ", "orders [+42]", "orders [042]", "[42]", ""] {
            assert_eq!(process(name), None, "{name}");
        }
        assert_eq!(process("orders [99999999999]"), None);
    }

    #[test]
    fn names_of_one_application() {
        let me = std::process::id();
        let names = Names::new(&application_name("orders", me), "orders");
        assert!(names.matches("orders [1]") && names.matches(&format!("orders [{me}]")));
        assert!(!names.matches("orders") && !names.matches("orders2 [1]") && !names.matches("my orders [1]"));

        let long = "x".repeat(80);
        let names = Names::new(&application_name(&long, me), &long);
        assert!(names.matches(&application_name(&long, 1)) && names.matches(&application_name(&long, 4_000_000)));
        assert!(!names.matches("x [1]"));

        let own = Names::new(&format!("web [{me}]"), "orders");
        assert!(own.matches("web [1]") && !own.matches("orders [1]"));
        let fixed = Names::new("web", "orders");
        assert!(fixed.matches("web") && !fixed.matches("web [1]"));
        let umlaut = Names::new("wäb", "orders");
        assert!(umlaut.matches("w??b") && umlaut.matches("w\\xc3\\xa4b"));
    }
}
