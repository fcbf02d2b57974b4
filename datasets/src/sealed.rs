//! JSON files that check themselves: the last field, `sha256`, is the hash of everything else.
//!
//! The hash is that of the canonical JSON of all other fields as they are read from the text, so a file that was only
//! formatted anew is still accepted, and a number whose last digit changes when it is written and read back is too.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::canonical::{canonical_json, sha256_hex};
use crate::error::Error;
use crate::files::replace_file;

/// Name of the field that holds the hash of all others.
const SUM: &str = "sha256";

/// Formats a value, which must be a JSON object, with a last field `sha256` over everything else.
///
/// # Errors
/// An error of the serialiser, or one that says that the value is not an object.
pub fn to_sealed_json<T: Serialize>(value: &T) -> Result<String, serde_json::Error> {
    let text = serde_json::to_string(value)?;
    let mut fields: Map<String, Value> = serde_json::from_str(&text)?;
    // A number is hashed as it will be read from the text.
    let written = serde_json::to_string(&fields)?;
    let read: Value = serde_json::from_str(&written)?;
    let sum = sha256_hex(canonical_json(&read).as_bytes());
    fields.insert(SUM.into(), sum.into());
    Ok(serde_json::to_string_pretty(&fields)? + "\n")
}

/// Writes a value as a JSON file that checks itself, atomically, and syncs the file.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] if the value is not a JSON object.
pub fn write_sealed<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text = to_sealed_json(value).map_err(|error| {
        let problem = format!("cannot write {} as JSON: {error}", path.display());
        Error::invalid(problem, "")
    })?;
    replace_file(path, text.as_bytes())
}

/// Reads a JSON file that checks itself; `None` if there is none.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`], which names the file, if its fields do not have the hash that it holds, or are not
/// those of `T`. `hint` says what to do then.
pub fn read_sealed<T: DeserializeOwned>(path: &Path, hint: &str) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let invalid = |why: String| Error::invalid(format!("{} {why}", path.display()), hint);
    let fields = open_seal(&bytes).map_err(invalid)?;
    let value = serde_json::from_value(fields);
    value
        .map(Some)
        .map_err(|error| invalid(format!("cannot be read: {error}")))
}

/// Checks the hash of a sealed object and returns its other fields. An error is a clause that follows the file's name.
pub(crate) fn open_seal(bytes: &[u8]) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| format!("is damaged or was changed: it is not JSON ({error})"))?;
    let Value::Object(mut fields) = value else {
        return Err("is damaged or was changed: it is not a JSON object".into());
    };
    let Some(sum) = fields.shift_remove(SUM) else {
        return Err(format!(
            "has no field `{SUM}`, by which its other fields are checked"
        ));
    };
    let fields = Value::Object(fields);
    let found = sha256_hex(canonical_json(&fields).as_bytes());
    match sum.as_str() == Some(found.as_str()) {
        true => Ok(fields),
        false => Err(format!(
            "is damaged or was changed: its field `{SUM}` is not the hash of its other fields"
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn sealed() -> (Value, Vec<u8>) {
        let value =
            json!({"b": [1, 2.5e-5, null, 0.1], "a": {"y": "ü\"", "x": true}, "n": u64::MAX});
        let text = to_sealed_json(&value).unwrap();
        (value, text.into_bytes())
    }

    #[test]
    fn a_sealed_value_is_read_back_and_its_last_field_is_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        assert_eq!(read_sealed::<Value>(&path, "").unwrap(), None);
        let (value, text) = sealed();
        write_sealed(&path, &value).unwrap();
        assert_eq!(fs::read(&path).unwrap(), text);
        assert_eq!(read_sealed::<Value>(&path, "").unwrap(), Some(value));
        // The hash as another program computes it:
        // python: hashlib.sha256(b'{"a":1,"b":"x"}').hexdigest()
        assert_eq!(
            to_sealed_json(&json!({"b": "x", "a": 1})).unwrap(),
            "{\n  \"b\": \"x\",\n  \"a\": 1,\n  \"sha256\": \"SUM\"\n}\n".replace("SUM", AB)
        );
        // Other white space and another order of the fields are the same file.
        let turned = format!("{{\"sha256\":\"{AB}\",\"a\":1,\"b\":\"x\"}}");
        fs::write(&path, turned).unwrap();
        let read = read_sealed::<Value>(&path, "").unwrap();
        assert_eq!(read, Some(json!({"a": 1, "b": "x"})));
        assert!(to_sealed_json(&[1]).is_err());
    }

    const AB: &str = "ecf9e98ec0641e23113ff3ce8bdc78d0ddd249886517fd4a7f68cc83d4e65667";

    /// Every flipped bit is found, or changes nothing that is read.
    #[test]
    fn a_flipped_bit_is_an_error_or_changes_nothing() {
        let (value, text) = sealed();
        let mut found = 0;
        for bit in 0..text.len() * 8 {
            let mut damaged = text.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            match open_seal(&damaged) {
                Ok(read) => assert_eq!(read, value, "bit {bit}"),
                Err(_) => found += 1,
            }
        }
        // White space between the fields is a tenth of the text.
        assert!(found > text.len() * 7, "{found} of {}", text.len() * 8);
    }

    #[test]
    fn a_changed_file_is_an_error_with_its_name_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        let message = |text: &str| {
            fs::write(&path, text).unwrap();
            read_sealed::<Value>(&path, "do this")
                .unwrap_err()
                .to_string()
        };
        let (_, text) = sealed();
        let changed = String::from_utf8(text).unwrap().replace("true", "false");
        for (text, why) in [
            (changed.as_str(), "is not the hash of its other fields"),
            ("{\"a\": 1}", "has no field `sha256`"),
            ("{\"a\": 1", "it is not JSON"),
            ("[]", "it is not a JSON object"),
        ] {
            let message = message(text);
            assert!(message.contains("/file.json "), "{message}");
            assert!(message.contains(why), "{message}");
            assert!(message.ends_with("\nhint: do this"), "{message}");
        }
    }

    proptest! {
        /// Numbers that do not survive a round trip through text are sealed as they are read.
        #[test]
        fn every_value_opens(numbers in prop::collection::vec(any::<f64>(), 0..20), text in ".*") {
            let text = to_sealed_json(&json!({"numbers": numbers, "text": text})).unwrap();
            prop_assert!(open_seal(text.as_bytes()).is_ok());
        }
    }
}
